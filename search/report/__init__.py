"""Everything that a search shows: live progress, tables, the HTML report and the plots."""
