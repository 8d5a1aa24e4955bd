"""Names and bytes: reading any supported checkpoint under native Wan names, and writing ours."""
