/* Preloaded into a process: one of its calls that change files below a folder fails, or kills it.
 *
 * faults_arm says which; without it nothing happens. Only what goes through these symbols is seen, which is all that Python,
 * numpy and Rust's standard library do. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, WRITE = 2, SYNC = 4, RENAME = 8, MKDIR = 16, REMOVE = 32 };

static char root[4096];
static int wanted, code, for_good;
static long first = -1, seen;

/* Of the calls in `kinds` below `folder`, the one of number `nth` (from 0; -1: none, they are only counted) fails with
 * `error`; with `all`, those that follow, too. `error` 0: the process is killed there. */
void faults_arm(const char* folder, int kinds, long nth, int error, int all) {
  strncpy(root, folder, sizeof root - 1);
  wanted = kinds;
  first = nth;
  code = error;
  for_good = all;
  seen = 0;
}

long faults_seen(void) { return seen; }

static int due(int kind, const char* path) {
  if ((wanted & kind) == 0 || strncmp(path, root, strlen(root)) != 0) return 0;
  const long now = seen++;
  if (first < 0 || now < first || (now > first && !for_good)) return 0;
  if (code == 0) kill(getpid(), SIGKILL);
  errno = code;
  return 1;
}

static int due_fd(int kind, int fd) {
  char link[64], path[4096];
  if (wanted == 0) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t size = readlink(link, path, sizeof path - 1);
  if (size <= 0) return 0;
  path[size] = '\0';
  return due(kind, path);
}

#define REAL(name) \
  static __typeof__(&name) real; \
  if (real == NULL) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPENS(name)                                                                                        \
  int name(const char* path, int flags, ...) {                                                             \
    REAL(name);                                                                                            \
    mode_t mode = 0;                                                                                       \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                   \
      va_list args;                                                                                        \
      va_start(args, flags);                                                                               \
      mode = va_arg(args, mode_t);                                                                         \
      va_end(args);                                                                                        \
    }                                                                                                      \
    return (flags & (O_WRONLY | O_RDWR | O_CREAT)) && due(OPEN, path) ? -1 : real(path, flags, mode);      \
  }
OPENS(open)
OPENS(open64)

ssize_t write(int fd, const void* data, size_t size) {
  REAL(write);
  return due_fd(WRITE, fd) ? -1 : real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec* parts, int count) {
  REAL(writev);
  return due_fd(WRITE, fd) ? -1 : real(fd, parts, count);
}
ssize_t pwrite64(int fd, const void* data, size_t size, off64_t at) {
  REAL(pwrite64);
  return due_fd(WRITE, fd) ? -1 : real(fd, data, size, at);
}
ssize_t copy_file_range(int from, off64_t* at, int to, off64_t* to_at, size_t size, unsigned flags) {
  REAL(copy_file_range);
  return due_fd(WRITE, to) ? -1 : real(from, at, to, to_at, size, flags);
}
ssize_t sendfile64(int to, int from, off64_t* at, size_t size) {
  extern ssize_t sendfile64(int, int, off64_t*, size_t);
  REAL(sendfile64);
  return due_fd(WRITE, to) ? -1 : real(to, from, at, size);
}
size_t fwrite(const void* data, size_t size, size_t count, FILE* file) {
  REAL(fwrite);
  return due_fd(WRITE, fileno(file)) ? 0 : real(data, size, count, file);
}
int ftruncate64(int fd, off64_t size) {
  REAL(ftruncate64);
  return due_fd(WRITE, fd) ? -1 : real(fd, size);
}
int fsync(int fd) {
  REAL(fsync);
  return due_fd(SYNC, fd) ? -1 : real(fd);
}
int fdatasync(int fd) {
  REAL(fdatasync);
  return due_fd(SYNC, fd) ? -1 : real(fd);
}
int rename(const char* from, const char* to) {
  REAL(rename);
  return due(RENAME, to) ? -1 : real(from, to);
}
int renameat2(int from_folder, const char* from, int to_folder, const char* to, unsigned flags) {
  REAL(renameat2);
  return due(RENAME, to) ? -1 : real(from_folder, from, to_folder, to, flags);
}
int mkdir(const char* path, mode_t mode) {
  REAL(mkdir);
  return due(MKDIR, path) ? -1 : real(path, mode);
}
int unlink(const char* path) {
  REAL(unlink);
  return due(REMOVE, path) ? -1 : real(path);
}
int rmdir(const char* path) {
  REAL(rmdir);
  return due(REMOVE, path) ? -1 : real(path);
}
int unlinkat(int folder, const char* path, int flags) {
  REAL(unlinkat);
  return due_fd(REMOVE, folder) ? -1 : real(folder, path, flags);
}
