"""Has a supervisor give up a server of disks for how often it died, however long that took."""

from onionskin.machine import disk_server

disk_server.WITHIN_SECONDS = 86400.0
