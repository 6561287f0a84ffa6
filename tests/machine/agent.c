/* agent.c: a small guest agent for tests: it freezes and thaws one file system, and says so, over a virtio-serial port.
 *
 *     agent PORT DIRECTORY
 *
 * It understands as much of QEMU's guest agent protocol as the tests need; a program that it is to run, it runs at once. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static FILE *port;

static void answer(const char *text)
{
    fprintf(port, "%s\n", text);
    fflush(port);
}

/* Returns the number behind a key. */
static long long number_of(const char *line, const char *key)
{
    const char *at = strstr(line, key);
    return at ? strtoll(at + strlen(key), NULL, 10) : 0;
}

/* Runs {"path": "P", "arg": ["A", ...]}: the strings behind "path". */
static int run(char *line)
{
    char *words[8] = {NULL}, *at = strstr(line, "\"path\": \"");
    int count = 0;
    for (char *quote = at ? at + 8 : NULL; quote && count < 7; quote = strchr(quote + strlen(quote) + 1, '"')) {
        char *end = strchr(quote + 1, '"');
        if (!end)
            break;
        *end = 0;
        if (strcmp(quote + 1, "arg"))
            words[count++] = quote + 1;
        quote = end;
    }
    pid_t pid = fork();
    if (!pid) {
        execvp(words[0], words);
        _exit(127);
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WEXITSTATUS(status);
}

int main(int arguments, char **values)
{
    static char line[65536];
    char text[128];
    int status = 0;
    if (arguments < 3 || !(port = fopen(values[1], "r+b")))
        return 2;
    setvbuf(port, NULL, _IONBF, 0);
    int directory = open(values[2], O_RDONLY | O_DIRECTORY);
    for (;;) {
        size_t length = 0;
        int byte;
        while ((byte = fgetc(port)) != '\n') {
            if (byte == EOF) { /* nobody is connected at the other end */
                clearerr(port);
                usleep(10000);
            } else if (byte == 0xff) {
                length = 0;
            } else if (length < sizeof line - 1) {
                line[length++] = (char)byte;
            }
        }
        line[length] = 0;
        if (strstr(line, "guest-sync-delimited")) {
            snprintf(text, sizeof text, "\xff{\"return\": %lld}", number_of(line, "\"id\": "));
            answer(text);
        } else if (strstr(line, "guest-fsfreeze-freeze")) {
            int failed = ioctl(directory, FIFREEZE, 0);
            answer(failed ? "{\"error\": {\"class\": \"GenericError\", \"desc\": \"it cannot be frozen\"}}" : "{\"return\": 1}");
        } else if (strstr(line, "guest-fsfreeze-thaw")) {
            int failed = ioctl(directory, FITHAW, 0);
            answer(failed ? "{\"return\": 0}" : "{\"return\": 1}");
        } else if (strstr(line, "guest-get-fsinfo")) {
            snprintf(text, sizeof text, "{\"return\": [{\"mountpoint\": \"%s\"}]}", values[2]);
            answer(text);
        } else if (strstr(line, "guest-set-time")) {
            long long now = number_of(line, "\"time\": ");
            struct timespec to = {now / 1000000000, now % 1000000000};
            answer(clock_settime(CLOCK_REALTIME, &to) ? "{\"error\": {\"desc\": \"not set\"}}" : "{\"return\": {}}");
        } else if (strstr(line, "guest-exec-status")) {
            snprintf(text, sizeof text, "{\"return\": {\"exited\": true, \"exitcode\": %d}}", status);
            answer(text);
        } else if (strstr(line, "guest-exec")) {
            status = run(line);
            answer("{\"return\": {\"pid\": 1}}");
        } else {
            answer("{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"this agent does not know that\"}}");
        }
    }
}
