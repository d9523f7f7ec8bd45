// SPDX-License-Identifier: Apache-2.0
/*
 * Programs of the tiny guest that need more than a shell: one static binary, its job
 * chosen by the name it is called by.
 *
 *   tg-write  DEV OFF4K COUNT SEED             write COUNT blocks of 4 KiB from block OFF4K
 *   tg-writer DEV SECONDS SEED [PER_SECOND]    write random 4 KiB blocks for a time
 *   tg-latency DEV SECONDS SEED PER_SECOND     the same, each followed by fdatasync; prints
 *                                              the microseconds that each pair took, also
 *                                              when SIGTERM ends it before its time
 *
 * Both bypass the page cache (O_DIRECT) where the file allows it and end with fsync. A
 * block's content is a function of the seed and its number alone, 64 lines of
 *
 *   SEED <seed, 12 wide, left> BLK <block, 12 digits> ....   (63 characters and \n)
 *
 * so that the host computes it too (tests/support/tiny_guest.py).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <linux/fs.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, LINE = 64 };

static void fail(const char *what)
{
    fprintf(stderr, "TG:FAILED %s: %s\n", what, strerror(errno));
    exit(1);
}

static unsigned long long number(const char *text, const char *name)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno || end == text || *end) {
        errno = EINVAL;
        fail(name);
    }
    return value;
}

static void fill(char *block, const char *seed, unsigned long long at)
{
    char line[LINE + 1];
    int n = snprintf(line, sizeof line, "SEED %-12.12s BLK %012llu ", seed, at);
    memset(line + n, '.', LINE - (size_t)n);
    line[LINE - 1] = '\n';
    for (int i = 0; i < BLOCK / LINE; i++)
        memcpy(block + i * LINE, line, LINE);
}

static int open_target(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_DIRECT, 0644);
    if (fd < 0 && errno == EINVAL)
        fd = open(path, O_RDWR | O_CREAT, 0644);
    if (fd < 0)
        fail(path);
    return fd;
}

static unsigned long long size_of(int fd, const char *path)
{
    struct stat st;
    uint64_t size = 0;
    if (fstat(fd, &st))
        fail(path);
    if (S_ISBLK(st.st_mode)) {
        if (ioctl(fd, BLKGETSIZE64, &size))
            fail(path);
        return size;
    }
    return (unsigned long long)st.st_size;
}

static void put(int fd, char *block, const char *seed, unsigned long long at)
{
    fill(block, seed, at);
    ssize_t n = pwrite(fd, block, BLOCK, (off_t)(at * BLOCK));
    if (n != BLOCK) {
        if (n >= 0)
            errno = ENOSPC;
        fail("write");
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int tg_write(int argc, char **argv, char *block)
{
    if (argc != 5) {
        fprintf(stderr, "usage: tg-write DEV OFF4K COUNT SEED\n");
        return 2;
    }
    unsigned long long first = number(argv[2], "OFF4K"), count = number(argv[3], "COUNT");
    int fd = open_target(argv[1]);
    for (unsigned long long at = first; at < first + count; at++)
        put(fd, block, argv[4], at);
    if (fsync(fd) || close(fd))
        fail(argv[1]);
    printf("TG:WROTE %s %llu %llu %s\n", argv[1], first, count, argv[4]);
    return 0;
}

/* xorshift64*: the places depend on the seed alone. */
static uint64_t seeded(const char *seed)
{
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (const char *c = seed; *c; c++)
        state = (state ^ (uint64_t)(unsigned char)*c) * 0x100000001b3u;
    return state ? state : 1;
}

static uint64_t next(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1du;
}

static int tg_writer(int argc, char **argv, char *block)
{
    if (argc != 4 && argc != 5) {
        fprintf(stderr, "usage: tg-writer DEV SECONDS SEED [PER_SECOND]\n");
        return 2;
    }
    double seconds = (double)number(argv[2], "SECONDS");
    unsigned long long pace = argc == 5 ? number(argv[4], "PER_SECOND") : 0;
    int fd = open_target(argv[1]);
    unsigned long long blocks = size_of(fd, argv[1]) / BLOCK, count = 0;
    if (!blocks) {
        errno = ENODATA;
        fail(argv[1]);
    }
    uint64_t state = seeded(argv[3]);
    double start = now(), at = start;
    while (at - start < seconds) {
        put(fd, block, argv[3], next(&state) % blocks);
        count++;
        at = now();
        if (pace) {
            double ahead = (double)count / (double)pace - (at - start);
            if (ahead > 0)
                usleep((useconds_t)(ahead * 1e6));
            at = now();
        }
    }
    if (fsync(fd) || close(fd))
        fail(argv[1]);
    printf("TG:WRITER %s %llu\n", argv[1], count);
    return 0;
}

static volatile sig_atomic_t stopped;

static void stop(int number)
{
    (void)number;
    stopped = 1;
}

static int tg_latency(int argc, char **argv, char *block)
{
    if (argc != 5) {
        fprintf(stderr, "usage: tg-latency DEV SECONDS SEED PER_SECOND\n");
        return 2;
    }
    double seconds = (double)number(argv[2], "SECONDS");
    unsigned long long pace = number(argv[4], "PER_SECOND");
    uint64_t state = seeded(argv[3]);
    int fd = open_target(argv[1]);
    unsigned long long blocks = size_of(fd, argv[1]) / BLOCK, count = 0;
    size_t room = (size_t)(seconds * (double)pace) + 1;
    uint32_t *took = calloc(room, sizeof *took);
    if (!blocks || !pace || !took) {
        errno = EINVAL;
        fail(argv[1]);
    }
    signal(SIGTERM, stop);
    double start = now();
    while (!stopped && count < room && now() - start < seconds) {
        uint64_t at = next(&state) % blocks;
        double began = now();
        put(fd, block, argv[3], at);
        if (fdatasync(fd))
            fail("fdatasync");
        took[count++] = (uint32_t)((now() - began) * 1e6);
        /* What came late isn't made up for: a slow disk is not asked faster. */
        double next_at = began + 1.0 / (double)pace;
        double ahead = next_at - now();
        if (ahead > 0)
            usleep((useconds_t)(ahead * 1e6));
    }
    for (unsigned long long i = 0; i < count; i++)
        printf("%u\n", took[i]);
    return close(fd) ? 1 : 0;
}

int main(int argc, char **argv)
{
    const char *slash = strrchr(argv[0], '/');
    const char *name = slash ? slash + 1 : argv[0];
    char *block = aligned_alloc(BLOCK, BLOCK);
    if (!block)
        fail("memory");
    if (!strcmp(name, "tg-write"))
        return tg_write(argc, argv, block);
    if (!strcmp(name, "tg-writer"))
        return tg_writer(argc, argv, block);
    if (!strcmp(name, "tg-latency"))
        return tg_latency(argc, argv, block);
    fprintf(stderr, "unknown program %s\n", name);
    return 2;
}
