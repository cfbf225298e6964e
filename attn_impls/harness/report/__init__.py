"""A report of saved runs: one HTML file that needs no network, Markdown for a pull request, or the charts as files."""
