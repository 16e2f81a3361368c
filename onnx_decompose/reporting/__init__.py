"""Figures: the report, what it is made of, and the page.

report       the JSON document
summarize    figures of an attempt and its claims
html         the page
"""
