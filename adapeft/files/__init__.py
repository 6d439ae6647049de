"""Files: whole or not there, checked when they are read, one per rank where many write."""
