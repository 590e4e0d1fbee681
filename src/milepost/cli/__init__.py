"""The command line ``milepost``: one thin file per command, each calling one library function."""
