"""What is installed, what the machine has, and what fits in its memory."""
