"""Measurements of the step tail: how long it takes, and how close that is to what memory allows."""
