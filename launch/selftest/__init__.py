"""The self-test before the start: which nodes are fit to train.

In the order to read it in: `report.py` (what is found), `measurements.py` (a device, a disk), `meeting.py`
(clocks, and links between neighbours), `device_process.py` (the process of one device; only there is torch),
`versions.py`, `node.py` (which supervises the devices of its node), `verdict.py` (the rules), `table.py`.
"""
