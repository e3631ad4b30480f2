"""The mathematics: schedules, methods, solvers, losses and the step. torch alone, no I/O, no globals."""
