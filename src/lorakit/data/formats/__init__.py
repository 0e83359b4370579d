"""Row formats: recognize the format of a row by its columns and convert it to conversations."""
