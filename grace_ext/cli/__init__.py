"""The command `grace-ext`: app.py defines the commands, and plan.py the options of `grace-ext plan`."""
