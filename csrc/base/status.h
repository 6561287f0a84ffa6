/* status.h: the return values of C functions of onionskin.
 *
 * A function returns a count or 0 on success, and a negative code on failure: -errno if the system refused, or a
 * code of the range below for errors that only onionskin knows. Nothing is ever reported through errno. Linux keeps
 * errno below 4096, so the two ranges cannot meet. */
#ifndef ONIONSKIN_BASE_STATUS_H
#define ONIONSKIN_BASE_STATUS_H

enum onion_status {
    ONION_E_FORMAT = -5000,       /* the bytes of a file break its format */
    ONION_E_VERSION = -5001,      /* a version or a feature bit that this code does not know */
    ONION_E_CHECKSUM = -5002,     /* a CRC32C that does not match */
    ONION_E_TORN = -5003,         /* a crash cut the last frame of a map log short */
    ONION_E_BOUNDS = -5004,       /* a range outside the volume */
    ONION_E_POISONED = -5005,     /* a sync failed: the durable state is not known until the volume is opened again */
    ONION_E_CLOSED = -5006,       /* the volume is closed */
    ONION_E_READ_ONLY = -5007,    /* a write to something that was opened for reading */
    ONION_E_CANCELLED = -5008,    /* the caller asked to stop */
    ONION_E_FORKED = -5009,       /* a handle that was opened before fork() is used in the child */
    ONION_E_VERIFY = -5010,       /* bytes read back from the medium are not those written */
    ONION_E_FULL_SEGMENT = -5011, /* a segment has no slot number left */
    ONION_E_CUT_LOG = -5012,      /* a map log ends before the point that the catalog knows to be durable */
    ONION_E_NOT_A_FILE = -5013,   /* a file of a store is a symbolic link, or no regular file */
    ONION_E_NUMBERS = -5014,      /* a volume has as many segments as it can have */
    ONION_E_MAPPINGS = -5015,     /* the process has as many mappings as the system allows it */
    ONION_E_JOURNAL_FULL = -5016, /* no room for a dirty record: a flush makes some. Stays inside the volume */
    ONION_E_MOVED = -5017,        /* another store, or none, is where the store was when it was opened */
    ONION_E_WHICH_BOOT = -5018, /* a process cannot tell whether a file is of this boot and mount: /proc, /sys hidden */
    ONION_E_OTHER_MOUNT = -5019 /* a file is of this boot, and of a mount that cannot be compared with this one */
};

#endif
