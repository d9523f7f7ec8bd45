/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* The conversation of a restore, from its first file to FINISH. */
#define _GNU_SOURCE
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "talk.h"

bool session_restore_file(struct session *s, const struct restore_pkt *pkt)
{
    static const char doing[] = "receiving a file's attributes";
    const struct stat *st = &pkt->statp;
    char line[LINE_SIZE];

    snprintf(s->name, sizeof s->name, "%s", pkt->ofname);
    s->data_open = s->data_done = false;
    s->position = s->peer_position = 0;
    s->answer = ANSWER_SKIP;
    if (strchr(pkt->ofname, '\n') != NULL) {
        fail(s->job, "file name with a line break.");
        return broken(s);
    }
    if (!COMMAND(s, doing, "FNAME:%s", pkt->ofname)
        || !COMMAND(s, doing, "STAT:%c %lld %u %u %o %u", S_ISDIR(st->st_mode) ? 'D' : 'F',
                    (long long)st->st_size, st->st_uid, st->st_gid,
                    (unsigned)(st->st_mode & 07777) | (unsigned)(st->st_mode & S_IFMT),
                    (unsigned)st->st_nlink)
        || !COMMAND(s, doing, "TSTAMP:%lld %lld %lld", (long long)st->st_atim.tv_sec,
                    (long long)st->st_mtim.tv_sec, (long long)st->st_ctim.tv_sec)
        || !send_packet(s, 'F', NULL, 0, doing) || !expect_line(s, line, "deciding about a file"))
        return false;
    if (strcmp(line, "OK") == 0)
        s->answer = ANSWER_EXTRACT;
    else if (strcmp(line, "CORE") == 0)
        s->answer = ANSWER_CORE;
    else if (strcmp(line, "SKIP") != 0)
        return protocol_error(s, "expected OK, SKIP or CORE, got \"%.100s\"", line);
    return true;
}

static bool open_data(struct session *s)
{
    if (s->answer != ANSWER_EXTRACT || s->data_done)
        return protocol_error(s, "Bacula sends data of %.100s although it is not wanted", s->name);
    if (!s->data_open && !COMMAND(s, "receiving a file", "DATA"))
        return false;
    s->data_open = true;
    return true;
}

bool session_write(struct session *s, const char *buffer, size_t length)
{
    static const char doing[] = "receiving a file's data";
    if (s->broken || !open_data(s))
        return false;
    if (s->position != s->peer_position && !COMMAND(s, doing, "OFFSET:%" PRId64, s->position))
        return false;
    for (size_t at = 0; at < length;) { /* one round, unless the network buffer was made huge */
        size_t n = length - at < PT_MAX_PAYLOAD ? length - at : PT_MAX_PAYLOAD;
        if (!send_packet(s, 'D', buffer + at, n, doing))
            return false;
        at += n;
    }
    s->position += (int64_t)length;
    s->peer_position = s->position;
    return true;
}

bool session_restore_file_done(struct session *s)
{
    if (s->broken)
        return false;
    if (s->answer != ANSWER_EXTRACT || s->data_done)
        return true;
    if (!open_data(s) || !send_packet(s, 'F', NULL, 0, "receiving the end of a file")
        || !expect_ok(s, "finishing a file"))
        return false;
    s->data_done = true;
    return true;
}

bool session_finish(struct session *s)
{
    s->confirmed = COMMAND(s, "finishing the restore", "FINISH")
                   && expect_end(s, "finishing the restore");
    return s->confirmed;
}
