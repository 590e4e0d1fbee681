"""The command line ``milepost``: one thin file for each command, over the library function of the same purpose."""
