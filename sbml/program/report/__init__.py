"""The report of a run: its results, its page, and the comparison of several runs.

Its files:

    result          a row of ``report.json``: its cell, its line, and its rows on the page
    page            report.json and report.html from values
    summary         the same from the files of a work directory
    comparison      comparison.html, from several work directories
    table           the report.html of --mode=table, from its values
    plots           figures as SVG text
    pictures        images as grids and PNG files
"""
