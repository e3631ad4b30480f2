"""The command line: each verb reads its options, calls a function of the kit and prints."""
