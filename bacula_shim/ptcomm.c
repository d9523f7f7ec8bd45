/* SPDX-License-Identifier: AGPL-3.0-or-later */
#define _GNU_SOURCE
#include "ptcomm.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

int64_t pt_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* Wait until `in` is readable or, when asked, `out` is writable; *ready says which. */
static enum pt_status wait_for(struct ptcomm *pt, bool writing, short *in, short *out)
{
    int64_t until = pt_now_ms() + pt->idle_ms;
    if (pt->deadline_ms != 0 && pt->deadline_ms < until)
        until = pt->deadline_ms;
    for (;;) {
        struct pollfd fds[3] = {
            { .fd = pt->wake, .events = POLLIN },
            { .fd = pt->in, .events = POLLIN },
            { .fd = writing ? pt->out : -1, .events = POLLOUT },
        };
        int64_t left = until - pt_now_ms();
        int n = poll(fds, 3, left > 0 ? (int)left : 0);
        if (n < 0) {
            if (errno == EINTR)
                continue;
            pt->os_error = errno;
            return PT_OS;
        }
        if (fds[0].revents != 0)
            return PT_CANCELLED;
        if (n == 0)
            return PT_TIMEOUT;
        *in = fds[1].revents;
        *out = fds[2].revents;
        return PT_OK;
    }
}

bool pt_readable(struct ptcomm *pt)
{
    struct pollfd fd = { .fd = pt->in, .events = POLLIN };
    return poll(&fd, 1, 0) > 0;
}

/* One readv, after waiting as long as allowed.  Returns bytes > 0 or a pt_status. */
static ssize_t read_some(struct ptcomm *pt, const struct iovec *iov, int count)
{
    for (;;) {
        short in, out;
        /* Polling first, though it costs a call: a cancel must win over a talkative peer. */
        enum pt_status status = wait_for(pt, false, &in, &out);
        if (status != PT_OK)
            return status;
        ssize_t n = readv(pt->in, iov, count);
        if (n > 0)
            return n;
        if (n == 0)
            return PT_CLOSED;
        if (errno != EAGAIN && errno != EINTR) {
            pt->os_error = errno;
            return PT_OS;
        }
    }
}

enum pt_status pt_next(struct ptcomm *pt, struct pt_packet *packet)
{
    while (pt->have < PT_HEADER) {
        struct iovec iov = { pt->header + pt->have, PT_HEADER - pt->have };
        ssize_t n = read_some(pt, &iov, 1);
        if (n < 0)
            return (enum pt_status)n;
        pt->have += (uint32_t)n;
    }
    pt->have = 0;
    uint32_t length = 0;
    for (int i = 1; i < PT_HEADER - 1; i++) {
        if (pt->header[i] < '0' || pt->header[i] > '9')
            return PT_GARBAGE;
        length = length * 10 + (uint32_t)(pt->header[i] - '0');
    }
    if (pt->header[0] < 'A' || pt->header[0] > 'Z' || pt->header[PT_HEADER - 1] != '\n')
        return PT_GARBAGE;
    pt->left = length;
    packet->letter = pt->header[0];
    packet->length = length;
    return PT_OK;
}

ssize_t pt_read(struct ptcomm *pt, void *buffer, size_t size)
{
    size_t want = size < pt->left ? size : pt->left;
    /* have is 0 here: while a payload is unread its header has been consumed. */
    struct iovec iov[2] = { { buffer, want }, { pt->header, PT_HEADER } };
    ssize_t n = read_some(pt, iov, want == pt->left ? 2 : 1);
    if (n < 0)
        return n;
    if ((size_t)n > want) {
        pt->have = (uint32_t)((size_t)n - want);
        n = (ssize_t)want;
    }
    pt->left -= (uint32_t)n;
    return n;
}

enum pt_status pt_read_all(struct ptcomm *pt, void *buffer, size_t size)
{
    char waste[4096];
    char *to = buffer;
    while (size > 0) {
        ssize_t n = to != NULL ? pt_read(pt, to, size)
                               : pt_read(pt, waste, size < sizeof waste ? size : sizeof waste);
        if (n < 0)
            return (enum pt_status)n;
        if (to != NULL)
            to += n;
        size -= (size_t)n;
    }
    return PT_OK;
}

enum pt_status pt_write(struct ptcomm *pt, char letter, const void *payload, size_t length)
{
    char header[PT_HEADER + 1];
    if (length > PT_MAX_PAYLOAD) {
        pt->os_error = EMSGSIZE;
        return PT_OS;
    }
    snprintf(header, sizeof header, "%c%06u\n", letter, (unsigned)length);
    struct iovec iov[2] = { { header, PT_HEADER }, { (void *)payload, length } };
    int at = 0, count = length > 0 ? 2 : 1;
    while (at < count) {
        short in = 0, out = 0;
        enum pt_status status = wait_for(pt, true, &in, &out);
        if (status != PT_OK)
            return status;
        /* The peer may speak at any moment, and may stop reading until it was heard. */
        if ((in & POLLIN) != 0) {
            if (pt->heard(pt->owner) != 0)
                return PT_HEARD;
            continue;
        }
        if ((in & (POLLHUP | POLLERR)) != 0 || (out & (POLLERR | POLLNVAL)) != 0)
            return PT_CLOSED;
        ssize_t n = writev(pt->out, iov + at, count - at);
        if (n < 0) {
            if (errno == EAGAIN || errno == EINTR)
                continue;
            if (errno == EPIPE)
                return PT_CLOSED;
            pt->os_error = errno;
            return PT_OS;
        }
        size_t done = (size_t)n;
        while (at < count && done >= iov[at].iov_len)
            done -= iov[at++].iov_len;
        if (at < count) {
            iov[at].iov_base = (char *)iov[at].iov_base + done;
            iov[at].iov_len -= done;
        }
    }
    return PT_OK;
}

enum pt_status pt_command(struct ptcomm *pt, const char *format, ...)
{
    char *line = NULL;
    va_list arguments;
    va_start(arguments, format);
    int length = vasprintf(&line, format, arguments);
    va_end(arguments);
    if (length < 0) {
        pt->os_error = ENOMEM;
        return PT_OS;
    }
    line[length] = '\n'; /* in place of the terminator: the length travels in the header */
    enum pt_status status = pt_write(pt, 'C', line, (size_t)length + 1);
    free(line);
    return status;
}
