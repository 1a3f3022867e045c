"""Several processes as one run: who does which share of the work, and how all of them come to hold the same weights.

Everything that takes part is handed a :class:`~editcli.distributed.team.Team`; a run of one process has a team of one,
for which nothing is sent anywhere.
"""
