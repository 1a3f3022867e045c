"""What a run looks like on a page: charts, plots and the self-contained HTML report."""
