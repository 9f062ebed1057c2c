"""What `experiments.make_docs` writes into the pages under docs/: tables, found numbers and the picture."""
