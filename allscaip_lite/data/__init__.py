"""Data sets in OMol25's format (`.aselmdb`): read, write, convert, download, describe, batch."""
