"""The files of the library: one way to write them, to check them, to lock a folder and to keep a run in it."""
