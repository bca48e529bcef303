"""Results of finished runs: from run directories to numbers, tables and figures."""
