"""Sources of rows: local files, addresses, hub datasets; decompression and parsing."""
