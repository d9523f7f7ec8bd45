/* SPDX-License-Identifier: AGPL-3.0-or-later */
/*
 * PTCOMM framing over two non-blocking pipes: 'S' + six decimal digits + '\n',
 * then that many bytes.  Every wait is bounded and ends at once when `wake`
 * (an eventfd) becomes readable.
 */
#ifndef PH_PTCOMM_H
#define PH_PTCOMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { PT_HEADER = 8, PT_MAX_PAYLOAD = 999999 };

/* How a call ended; everything below PT_OK leaves the connection unusable. */
enum pt_status {
    PT_OK = 0,
    PT_CLOSED = -1,    /* end of file, or EPIPE */
    PT_TIMEOUT = -2,   /* nothing moved for idle_ms, or the deadline passed */
    PT_CANCELLED = -3, /* wake became readable */
    PT_GARBAGE = -4,   /* not a PTCOMM header; the bytes are in `header` */
    PT_OS = -5,        /* a system call failed; see `os_error` */
    PT_HEARD = -6,     /* the `heard` callback refused what came while we wrote */
};

struct ptcomm {
    int in, out, wake;
    int idle_ms;         /* longest wait without a single byte moving */
    int64_t deadline_ms; /* on pt_now_ms()'s clock; 0: none */
    char header[PT_HEADER];
    uint32_t have;       /* bytes of the next header that are here already */
    uint32_t left;       /* payload bytes of the current packet not yet read */
    int os_error;
    /* Called while writing when the peer speaks; consumes one packet.  Non-zero stops the write. */
    int (*heard)(void *owner);
    void *owner;
};

struct pt_packet {
    char letter;
    uint32_t length;
};

int64_t pt_now_ms(void);

/* Read the next packet's header; the previous payload must have been read. */
enum pt_status pt_next(struct ptcomm *pt, struct pt_packet *packet);

/*
 * Read 1..size bytes of the current packet's payload into buffer, straight from
 * the pipe, and the next packet's header behind it if that fits one system call.
 * Returns the number of bytes, or a pt_status.
 */
ssize_t pt_read(struct ptcomm *pt, void *buffer, size_t size);

/* Read `size` bytes of payload (buffer may be NULL: throw them away). */
enum pt_status pt_read_all(struct ptcomm *pt, void *buffer, size_t size);

/* Write one packet. */
enum pt_status pt_write(struct ptcomm *pt, char letter, const void *payload, size_t length);

/* Write a command line; the newline is added here. */
enum pt_status pt_command(struct ptcomm *pt, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Is something (a packet, or the end of file) waiting to be read right now? */
bool pt_readable(struct ptcomm *pt);

#endif
