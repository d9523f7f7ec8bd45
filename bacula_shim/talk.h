/* SPDX-License-Identifier: AGPL-3.0-or-later */
/*
 * Packets of one conversation, with everything that can go wrong in them.  For
 * session.c, backup.c and restore.c.  Each function returns false after it has
 * raised a FATAL message and hung up; `doing` completes "... while <doing>".
 */
#ifndef PH_TALK_H
#define PH_TALK_H

#include "session.h"

void hang_up(struct session *s);

/* Hang up and fail the job, without a word; always false. */
bool broken(struct session *s);

/* The backend broke the rules; always false. */
bool protocol_error(struct session *s, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* A pt_* call failed; always false. */
bool lost(struct session *s, enum pt_status status, const char *doing);

/* The job message type of a packet letter, 0 if it is not that of a message. */
int message_type(char letter);

/* Read the text of a message packet and pass it on.  A and E end the conversation. */
bool hear(struct session *s, const struct pt_packet *packet);

/* For struct ptcomm: what comes while we write. */
int heard(void *owner);

/* The next packet that is not a message: C, D or F. */
bool receive(struct session *s, struct pt_packet *packet, const char *doing);

/* Read a C packet's payload as a line of LINE_SIZE, without its newline. */
bool read_line(struct session *s, const struct pt_packet *packet, char *line);

bool expect_line(struct session *s, char *line, const char *doing);
bool expect_end(struct session *s, const char *doing);
bool expect_ok(struct session *s, const char *doing);

bool send_packet(struct session *s, char letter, const void *payload, size_t length,
                 const char *doing);

/* COMMAND(s, doing, format, ...) */
#define COMMAND(s, doing, ...)                                                                     \
    command_sent((s), (s)->broken ? PT_HEARD : pt_command(&(s)->pt, __VA_ARGS__), (doing))

bool command_sent(struct session *s, enum pt_status status, const char *doing);

#endif
