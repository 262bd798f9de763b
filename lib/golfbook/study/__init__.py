"""From a job file to runs to one table: planning, executing, collecting."""
