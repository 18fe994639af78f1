"""Pipeline parallelism: schedules as tables, what is wrong with one, what one costs."""
