"""Installed packages, devices of the machine, and the stages that fit in its memory."""
