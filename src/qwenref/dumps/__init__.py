"""The room that holds the numbers: one file, a directory of them, its manifest, its layout."""
