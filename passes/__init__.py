"""Graph passes, one rewrite a file. Importing this package imports none of them."""
