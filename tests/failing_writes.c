/* Loaded before libc: records the writes below a folder, and lets one of them fail or kill the process half way. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static char root[PATH_MAX], counted[PATH_MAX];
static int record = -1, failure; /* an errno; -1: SIGKILL; 0: none */
static long number, failing;

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Watch `folder`; `file` gets a line for each write. Of those with `of` in their path let that number (from 1) fail. */
void watch_writes(const char *folder, const char *file, const char *of, long at, int how) {
    record = REAL(open)(file, O_WRONLY | O_CREAT | O_APPEND, 0666);
    failing = at, failure = how;
    strncpy(counted, of, sizeof counted - 1);
    strncpy(root, folder, sizeof root - 1);
}

/* Whether this write shall fail: how, or 0. */
static int met(const char *kind, const char *path) {
    size_t length = strlen(root);
    if (!length || strncmp(path, root, length) || path[length] != '/') return 0;
    struct timespec now;
    char line[PATH_MAX + 64];
    clock_gettime(CLOCK_MONOTONIC, &now);
    int size = snprintf(line, sizeof line, "%ld.%09ld %s %s\n", (long)now.tv_sec, now.tv_nsec, kind, path + length + 1);
    REAL(write)(record, line, size);
    return strstr(path + length, counted) && ++number == failing ? failure : 0;
}

static int fails(const char *kind, const char *path) {
    int how = met(kind, path);
    if (how < 0) kill(getpid(), SIGKILL);
    errno = how ? how : errno;
    return how;
}

/* Of a write to a file: half of it is done before. */
static int write_fails(int file, const void *bytes, size_t size) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = root[0] && file != record ? readlink(link, path, sizeof path - 1) : -1;
    if (length < 0) return 0;
    path[length] = 0;
    int how = met("write", path);
    if (!how) return 0;
    REAL(write)(file, bytes, size / 2);
    if (how < 0) kill(getpid(), SIGKILL);
    errno = how;
    return how;
}

#define OPEN(name)                                                                     \
    int name(const char *path, int flags, ...) {                                       \
        va_list list;                                                                  \
        va_start(list, flags);                                                         \
        mode_t mode = va_arg(list, mode_t);                                            \
        va_end(list);                                                                  \
        if ((flags & (O_WRONLY | O_RDWR)) && fails("open", path)) return -1;           \
        return REAL(name)(path, flags, mode);                                          \
    }
#define OPENAT(name)                                                                   \
    int name(int folder, const char *path, int flags, ...) {                           \
        va_list list;                                                                  \
        va_start(list, flags);                                                         \
        mode_t mode = va_arg(list, mode_t);                                            \
        va_end(list);                                                                  \
        if ((flags & (O_WRONLY | O_RDWR)) && fails("open", path)) return -1;           \
        return REAL(name)(folder, path, flags, mode);                                  \
    }
#define FOPEN(name)                                                                    \
    FILE *name(const char *path, const char *mode) {                                   \
        return strpbrk(mode, "wa+") && fails("open", path) ? NULL : REAL(name)(path, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int file, const void *bytes, size_t size) {
    return write_fails(file, bytes, size) ? -1 : REAL(write)(file, bytes, size);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    return write_fails(file, parts[0].iov_base, parts[0].iov_len) ? -1 : REAL(writev)(file, parts, count);
}

ssize_t pwrite64(int file, const void *bytes, size_t size, off64_t offset) {
    return write_fails(file, bytes, size) ? -1 : REAL(pwrite64)(file, bytes, size, offset);
}

int mkdir(const char *path, mode_t mode) { return fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode); }

int rename(const char *from, const char *to) { return fails("rename", to) ? -1 : REAL(rename)(from, to); }

/* Only of files of a checkpoint: transformers removes old ones, file by file. */
static int removal_fails(int folder, const char *name) {
    char link[64], path[PATH_MAX];
    if (!root[0]) return 0;
    ssize_t length = 0;
    if (folder != AT_FDCWD && name[0] != '/') {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, path, sizeof path - 1);
        if (length < 0) return 0;
        path[length++] = '/';
    }
    snprintf(path + length, sizeof path - length, "%s", name);
    size_t above = strlen(root);
    return !strncmp(path, root, above) && strstr(path + above, "/checkpoint-") ? fails("remove", path) : 0;
}

int unlink(const char *path) { return removal_fails(AT_FDCWD, path) ? -1 : REAL(unlink)(path); }

int unlinkat(int folder, const char *path, int flags) {
    return removal_fails(folder, path) ? -1 : REAL(unlinkat)(folder, path, flags);
}
