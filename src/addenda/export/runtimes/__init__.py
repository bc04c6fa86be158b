"""One file for each program that runs exported files, and loads them to prove them."""
