"""Around the step: processes, states, the run's folder, stopping, and what is measured on the way."""
