"""Edits as they are asked for: tasks and their options, pictures that are given, and how they are drawn."""
