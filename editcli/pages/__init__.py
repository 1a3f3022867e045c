"""Pages about a run: charts, plots and the self-contained HTML report."""
