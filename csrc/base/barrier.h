/* barrier.h: the two calls that make something durable.
 *
 * Each use is marked with its name, so that the crash tests can take it out and check that they notice. */
#ifndef ONIONSKIN_BASE_BARRIER_H
#define ONIONSKIN_BASE_BARRIER_H

/* Makes a file's data, and the metadata needed to read it, durable. 0 or -errno. */
int onion_sync_file(int fd);
/* Begins to write a file's dirty pages out, so that a sync that follows has less to wait for. A hint: nothing is
 * durable. */
void onion_start_writing(int fd);
/* Makes the names in a directory durable. 0 or -errno. */
int onion_sync_directory(const char *path);

#endif
