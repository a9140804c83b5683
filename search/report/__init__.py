"""What people see of a search: live progress, tables, the HTML report and the plots."""
