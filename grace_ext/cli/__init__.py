"""The command `grace-ext`: app.py has the commands, and plan.py the options of `grace-ext plan`."""
