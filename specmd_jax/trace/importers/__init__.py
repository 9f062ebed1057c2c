"""Foreign trace formats, one file each; `table` lists them."""
