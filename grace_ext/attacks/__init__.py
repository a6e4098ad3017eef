"""Attacks on gradients: what somebody who sees a rank's messages learns of its data. `grace-ext privacy` runs them; they need torch."""
