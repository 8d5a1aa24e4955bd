"""Recipes: one TOML file that says which stages run, with which settings.

Each table is a stage. Stages run in the order of `vmla_convert.config.STAGES`. All of them write
into one folder, where later stages find what earlier ones made.
"""
