/* SPDX-License-Identifier: AGPL-3.0-or-later */
#define _GNU_SOURCE
#include "talk.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Bacula cuts a message at 2,000 bytes, its own prefix included. */
enum { MESSAGE_SIZE = 1800, MESSAGES_SIZE = 32768, DRAIN_MS = 3000 };

/* -- job messages ----------------------------------------------------------- */

static void message(struct job *job, int type, const char *text)
{
    plugin.core->job_message(job->ctx, "podheitor-proxmox", 0, type, 0, "%s\n", text);
}

static void vsay(struct job *job, int type, const char *format, va_list arguments)
{
    char text[MESSAGE_SIZE + 1];
    int n = snprintf(text, sizeof text, "podheitor-proxmox: ");
    vsnprintf(text + n, sizeof text - (size_t)n, format, arguments);
    message(job, type, text);
}

void say(struct job *job, int type, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsay(job, type, format, arguments);
    va_end(arguments);
}

bool fail(struct job *job, const char *format, ...)
{
    va_list arguments;
    job->failed = true;
    if (atomic_load(&job->cancelled))
        return false;
    va_start(arguments, format);
    vsay(job, plugin.dialect->fatal, format, arguments);
    va_end(arguments);
    return false;
}

/* How much of text, at most MESSAGE_SIZE, goes into one message: whole lines if there are any,
 * never half a UTF-8 character. */
static size_t message_cut(const char *text, size_t length)
{
    if (length <= MESSAGE_SIZE)
        return length;
    const char *newline = memrchr(text, '\n', MESSAGE_SIZE);
    if (newline != NULL && newline > text)
        return (size_t)(newline - text) + 1;
    size_t cut = MESSAGE_SIZE;
    while (cut > MESSAGE_SIZE - 4 && ((unsigned char)text[cut] & 0xC0) == 0x80)
        cut--;
    return cut;
}

/* Pass the backend's words on: as an argument, never as a format, and in pieces. */
static void relay(struct job *job, int type, char *text, size_t length, size_t lost)
{
    for (size_t i = 0; i < length; i++)
        if (((unsigned char)text[i] < ' ' && text[i] != '\n' && text[i] != '\t') || text[i] == 127)
            text[i] = '?';
    while (length > 0 && (text[length - 1] == '\n' || text[length - 1] == ' '))
        length--;
    if (length == 0)
        message(job, type, "podheitor-proxmox: the backend sent a message without text");
    while (length > 0) {
        char piece[MESSAGE_SIZE + 1];
        size_t cut = message_cut(text, length);
        memcpy(piece, text, cut);
        piece[cut] = '\0';
        if (piece[cut - 1] == '\n')
            piece[cut - 1] = '\0';
        message(job, type, piece);
        text += cut;
        length -= cut;
    }
    if (lost > 0)
        say(job, type, "(%zu bytes of this message were left out)", lost);
}

/* -- failures of a conversation --------------------------------------------- */

void hang_up(struct session *s)
{
    s->broken = true;
    s->pt.in = s->pt.out = -1;
    child_close(&s->child); /* end of file is what tells the backend */
}

bool broken(struct session *s)
{
    hang_up(s);
    s->job->failed = true;
    return false;
}

bool protocol_error(struct session *s, const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    fail(s->job, "protocol error: %s. Plug-in and backend must be of the same version.", text);
    return broken(s);
}

static void printable(char *to, size_t size, const char *from, size_t length)
{
    size_t at = 0;
    for (size_t i = 0; i < length && at + 5 < size; i++)
        at += (size_t)snprintf(to + at, size - at, isprint((unsigned char)from[i]) ? "%c" : "\\x%02x",
                               (unsigned char)from[i]);
    to[at] = '\0';
}

/* The conversation ended in a way the protocol does not know. */
bool lost(struct session *s, enum pt_status status, const char *doing)
{
    char text[64];
    switch (status) {
    case PT_CANCELLED:
        s->job->failed = true;
        break;
    case PT_CLOSED:
        hang_up(s);
        child_wait(&s->child, DRAIN_MS, true);
        child_describe(&s->child, text, sizeof text);
        fail(s->job, "the backend ended without a goodbye (%s) while %s; its own log says why.", text,
             doing);
        break;
    case PT_TIMEOUT:
        fail(s->job, "the backend was silent for too long (%d s) while %s.",
             (s->pt.deadline_ms != 0 ? plugin.status_ms : s->pt.idle_ms) / 1000, doing);
        break;
    case PT_GARBAGE:
        printable(text, sizeof text, s->pt.header, PT_HEADER);
        return protocol_error(s, "\"%s\" is not a packet header (while %s)", text, doing);
    case PT_HEARD: /* reported where it was heard */
        break;
    case PT_OS:
    case PT_OK:
        fail(s->job, "talking to the backend failed while %s: %s", doing, strerror(s->pt.os_error));
        break;
    }
    return broken(s);
}

/* -- packets ---------------------------------------------------------------- */

int message_type(char letter)
{
    const struct dialect *d = plugin.dialect;
    switch (letter) {
    case 'A': return d->fatal;
    case 'E':
    case 'Q': return d->error;
    case 'W': return d->warning;
    case 'I':
    case 'V': return d->info;
    case 'S': return d->saved;
    case 'N': return d->notsaved;
    case 'R': return d->restored;
    case 'P': return d->skipped;
    case 'O': return d->mount;
    default: return 0;
    }
}

/* Read the text of a message packet and pass it on.  A and E end the conversation. */
bool hear(struct session *s, const struct pt_packet *packet)
{
    size_t keep = packet->length < MESSAGES_SIZE ? packet->length : MESSAGES_SIZE;
    char *text = malloc(keep + 1);
    if (text == NULL) {
        fail(s->job, "out of memory for a message of the backend.");
        return broken(s);
    }
    enum pt_status status = pt_read_all(&s->pt, text, keep);
    if (status == PT_OK)
        status = pt_read_all(&s->pt, NULL, packet->length - keep);
    if (status == PT_OK)
        relay(s->job, message_type(packet->letter), text, keep, packet->length - keep);
    free(text);
    if (status != PT_OK)
        return lost(s, status, "sending a message");
    if (packet->letter == 'E')
        fail(s->job, "the backend gave up after the error above.");
    if (packet->letter == 'A' || packet->letter == 'E')
        return broken(s);
    return true;
}

/* The next packet that is not a message. */
bool receive(struct session *s, struct pt_packet *packet, const char *doing)
{
    if (s->broken)
        return false;
    for (;;) {
        enum pt_status status = pt_next(&s->pt, packet);
        if (status != PT_OK)
            return lost(s, status, doing);
        if (message_type(packet->letter) != 0) {
            if (!hear(s, packet))
                return false;
            continue;
        }
        switch (packet->letter) {
        case 'C':
        case 'D':
            return true;
        case 'F':
        case 'T':
            if (packet->length != 0)
                return protocol_error(s, "%c packet with %" PRIu32 " bytes (while %s)",
                                      packet->letter, packet->length, doing);
            if (packet->letter == 'T') {
                fail(s->job, "the backend hung up while %s.", doing);
                return broken(s);
            }
            return true;
        default:
            return protocol_error(s, "unknown packet letter %c (while %s)", packet->letter, doing);
        }
    }
}

/* What comes while we write: only messages are in order. */
int heard(void *owner)
{
    struct session *s = owner;
    struct pt_packet packet;
    enum pt_status status = pt_next(&s->pt, &packet);
    if (status != PT_OK)
        lost(s, status, "it should have been listening");
    else if (message_type(packet.letter) == 0)
        protocol_error(s, "%c packet while it was not the backend's turn", packet.letter);
    else
        hear(s, &packet);
    return s->broken ? -1 : 0;
}

/* A write found the pipe closed: the last words, if any, are the better reason. */
static bool write_lost(struct session *s, enum pt_status status, const char *doing)
{
    if (status == PT_CLOSED) {
        struct pt_packet packet;
        s->pt.deadline_ms = pt_now_ms() + DRAIN_MS;
        while (pt_next(&s->pt, &packet) == PT_OK && message_type(packet.letter) != 0)
            if (!hear(s, &packet))
                return false;
        s->pt.deadline_ms = 0;
    }
    return lost(s, status, doing);
}

bool send_packet(struct session *s, char letter, const void *payload, size_t length,
                        const char *doing)
{
    if (s->broken)
        return false;
    enum pt_status status = pt_write(&s->pt, letter, payload, length);
    return status == PT_OK ? true : write_lost(s, status, doing);
}

bool command_sent(struct session *s, enum pt_status status, const char *doing)
{
    return status == PT_OK ? true : write_lost(s, status, doing);
}

/* Read a C packet's payload as a line, without its newline. */
bool read_line(struct session *s, const struct pt_packet *packet, char *line)
{
    if (packet->length >= LINE_SIZE)
        return protocol_error(s, "command of %" PRIu32 " bytes", packet->length);
    enum pt_status status = pt_read_all(&s->pt, line, packet->length);
    if (status != PT_OK)
        return lost(s, status, "sending a command");
    size_t length = packet->length;
    if (length > 0 && line[length - 1] == '\n')
        length--;
    line[length] = '\0';
    if (strlen(line) != length)
        return protocol_error(s, "command with a NUL byte: %.60s", line);
    return true;
}

bool expect_line(struct session *s, char *line, const char *doing)
{
    struct pt_packet packet;
    if (!receive(s, &packet, doing))
        return false;
    if (packet.letter != 'C')
        return protocol_error(s, "expected a command, got %c (while %s)", packet.letter, doing);
    return read_line(s, &packet, line);
}

bool expect_end(struct session *s, const char *doing)
{
    struct pt_packet packet;
    if (!receive(s, &packet, doing))
        return false;
    if (packet.letter == 'F')
        return true;
    char line[LINE_SIZE] = "data";
    if (packet.letter == 'C' && !read_line(s, &packet, line))
        return false;
    return protocol_error(s, "expected F, got %c \"%.100s\" (while %s)", packet.letter, line, doing);
}

bool expect_ok(struct session *s, const char *doing)
{
    char line[LINE_SIZE];
    if (!expect_line(s, line, doing))
        return false;
    if (strcmp(line, "OK") != 0)
        return protocol_error(s, "expected OK, got \"%.100s\" (while %s)", line, doing);
    return true;
}
