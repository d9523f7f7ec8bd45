/* SPDX-License-Identifier: AGPL-3.0-or-later */
/* The conversation of a backup or an estimate, from BackupStart to JobStatus. */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "talk.h"

enum { OBJECT_SIZE = 16 << 20, FAILED_STATUS_MS = 60000 };

bool session_peek(struct session *s, bool *more)
{
    struct pt_packet packet;
    *more = false;
    if (s->broken)
        return false;
    while (!s->peeked && !s->no_more) {
        if (!receive(s, &packet, "preparing the next file"))
            return false;
        if (packet.letter == 'F') {
            s->no_more = true;
        } else if (packet.letter == 'D') {
            return protocol_error(s, "data without a file");
        } else {
            if (!read_line(s, &packet, s->line))
                return false;
            s->peeked = strcmp(s->line, "FileIndex") != 0;
            if (!s->peeked
                && !COMMAND(s, "telling the file index", "%d",
                            number_value(s->job, plugin.dialect->var_file_index)))
                return false;
        }
    }
    *more = s->peeked;
    return true;
}

/* "KEY:value" → value, or NULL */
static const char *after(const char *line, const char *key)
{
    size_t n = strlen(key);
    return strncmp(line, key, n) == 0 ? line + n : NULL;
}

static bool parse_number(const char *text, int64_t maximum, int64_t *value)
{
    char *end;
    if (!isdigit((unsigned char)text[0]))
        return false;
    errno = 0;
    long long number = strtoll(text, &end, 10);
    if (errno != 0 || *end != '\0' || number > maximum)
        return false;
    *value = number;
    return true;
}

/* RESTOREOBJ:name / PLUGINCONFIG:name, then KEY_LEN:n, D..., F */
static bool read_object(struct session *s, const char *name, enum entry entry, const char *length_key)
{
    static const char doing[] = "sending a restore object";
    struct pt_packet packet;
    int64_t length;

    snprintf(s->name, sizeof s->name, "%s", name);
    s->entry = entry;
    if (!expect_line(s, s->line, doing))
        return false;
    const char *digits = after(s->line, length_key);
    if (digits == NULL || !parse_number(digits, OBJECT_SIZE, &length))
        return protocol_error(s, "expected %s0..%d, got \"%.100s\"", length_key, OBJECT_SIZE, s->line);
    s->object = calloc(1, (size_t)length + 3);
    if (s->object == NULL) {
        fail(s->job, "out of memory for a restore object of %" PRId64 " bytes.", length);
        return broken(s);
    }
    s->object_length = (uint32_t)length;
    /* bconsole reads a plugin config as text, whose NUL belongs to it.  One to three of them make
     * a length divisible by 3: Bacula 9.6 with SQLite loses objects whose length is 1 modulo 3. */
    if (entry == ENTRY_PLUGIN_CONFIG)
        s->object_length += 3 - s->object_length % 3;
    for (int64_t at = 0;;) {
        if (!receive(s, &packet, doing))
            return false;
        if (packet.letter == 'F' && at == length)
            return true;
        if (packet.letter != 'D' || packet.length > length - at)
            return protocol_error(s, "object %.100s does not have its %" PRId64 " bytes", s->name,
                                  length);
        enum pt_status status = pt_read_all(&s->pt, s->object + at, packet.length);
        if (status != PT_OK)
            return lost(s, status, doing);
        at += packet.length;
    }
}

static bool parse_stat(struct session *s, const char *text)
{
    char type;
    unsigned long long size;
    unsigned uid, gid, mode, links;
    int used = 0;
    if (sscanf(text, "%c %llu %u %u %o %u%n", &type, &size, &uid, &gid, &mode, &links, &used) != 6
        || (text[used] != '\0' && text[used] != ' ') || size > INT64_MAX
        || (type != 'F' && type != 'E' && type != 'D'))
        return protocol_error(s, "attributes not understood: \"STAT:%.100s\"", text);
    s->stat.st_mode = (type == 'D' ? S_IFDIR : S_IFREG) | (mode & 07777);
    s->stat.st_size = (off_t)size;
    s->stat.st_uid = uid;
    s->stat.st_gid = gid;
    s->stat.st_nlink = links;
    s->stat.st_blksize = 65536;
    s->stat.st_blocks = (blkcnt_t)(size / 512 + (size % 512 != 0));
    return true;
}

static bool parse_times(struct session *s, const char *text)
{
    long long access, modified, changed;
    int used = 0;
    if (sscanf(text, "%lld %lld %lld%n", &access, &modified, &changed, &used) != 3
        || text[used] != '\0')
        return protocol_error(s, "times not understood: \"TSTAMP:%.100s\"", text);
    s->stat.st_atim.tv_sec = access;
    s->stat.st_mtim.tv_sec = modified;
    s->stat.st_ctim.tv_sec = changed;
    return true;
}

static bool read_file_head(struct session *s, const char *name)
{
    static const char doing[] = "describing a file";
    struct pt_packet packet;
    const char *value;

    if (name[0] != '/')
        return protocol_error(s, "file name \"%.100s\" is not absolute", name);
    snprintf(s->name, sizeof s->name, "%s", name);
    s->entry = ENTRY_FILE;
    memset(&s->stat, 0, sizeof s->stat);
    s->offsets = s->has_data = s->at_end = false;
    s->position = 0;
    for (;;) {
        if (!receive(s, &packet, doing))
            return false;
        if (packet.letter == 'F')
            break;
        if (packet.letter != 'C')
            return protocol_error(s, "data inside the attributes of %.100s", s->name);
        if (!read_line(s, &packet, s->line))
            return false;
        bool ok;
        if ((value = after(s->line, "STAT:")) != NULL)
            ok = parse_stat(s, value);
        else if ((value = after(s->line, "TSTAMP:")) != NULL)
            ok = parse_times(s, value);
        else if (strcmp(s->line, "OPTIONS:offsets") == 0)
            ok = s->offsets = true;
        else
            ok = protocol_error(s, "unknown attribute \"%.100s\" of %.100s", s->line, s->name);
        if (!ok)
            return false;
    }
    if (s->stat.st_mode == 0)
        return protocol_error(s, "no STAT for %.100s", s->name);
    if (s->kind != KIND_BACKUP)
        return true;
    if (!receive(s, &packet, doing))
        return false;
    if (packet.letter == 'F')
        return true;
    if (packet.letter == 'C') {
        if (!read_line(s, &packet, s->line))
            return false;
        s->has_data = strcmp(s->line, "DATA") == 0;
    }
    return s->has_data
           || protocol_error(s, "expected DATA or F after the attributes of %.100s", s->name);
}

bool session_entry(struct session *s)
{
    const char *name;
    if (s->broken)
        return false;
    s->peeked = false;
    if ((name = after(s->line, "FNAME:")) != NULL)
        return read_file_head(s, name);
    if ((name = after(s->line, "RESTOREOBJ:")) != NULL)
        return read_object(s, name, ENTRY_RESTORE_OBJECT, "RESTOREOBJ_LEN:");
    if ((name = after(s->line, "PLUGINCONFIG:")) != NULL)
        return read_object(s, name, ENTRY_PLUGIN_CONFIG, "PLUGINCONFIG_LEN:");
    return protocol_error(s, "unknown command \"%.100s\"", s->line);
}

/* Between D packets of a file.  *jumped: the next byte does not continue the previous one. */
static bool next_data(struct session *s, bool *jumped)
{
    struct pt_packet packet;
    *jumped = false;
    if (!receive(s, &packet, "sending a file's data"))
        return false;
    if (packet.letter == 'D')
        return true;
    if (packet.letter == 'F') {
        s->at_end = true;
        return true;
    }
    int64_t offset;
    if (!read_line(s, &packet, s->line))
        return false;
    const char *digits = after(s->line, "OFFSET:");
    if (digits == NULL || !parse_number(digits, INT64_MAX - PT_MAX_PAYLOAD, &offset))
        return protocol_error(s, "expected data of %.100s, got \"%.100s\"", s->name, s->line);
    *jumped = offset != s->position;
    if (*jumped && !s->offsets)
        return protocol_error(s, "%.100s jumps to %" PRId64 " but was not announced with offsets",
                              s->name, offset);
    s->position = offset;
    return true;
}

bool session_read(struct session *s, char *buffer, size_t size, size_t *length, int64_t *offset)
{
    *length = 0;
    *offset = s->position;
    if (s->broken)
        return false;
    while (*length < size && s->has_data && !s->at_end) {
        if (s->pt.left == 0) {
            bool jumped;
            if (!next_data(s, &jumped))
                return false;
            if (jumped && *length > 0)
                return true;
            if (*length == 0)
                *offset = s->position;
            continue;
        }
        ssize_t n = pt_read(&s->pt, buffer + *length, size - *length);
        if (n < 0)
            return lost(s, (enum pt_status)n, "sending a file's data");
        *length += (size_t)n;
        s->position += n;
    }
    return true;
}

bool session_entry_done(struct session *s)
{
    free(s->object);
    s->object = NULL;
    if (s->broken)
        return false;
    if (s->entry == ENTRY_FILE && s->has_data && !s->at_end) {
        /* The storage daemon may be gone, which the job log knows already. */
        if (job_status(s->job) != 'f')
            fail(s->job, "%.200s was not read to its end by the File Daemon.", s->name);
        return broken(s);
    }
    s->entry = ENTRY_NONE;
    return true;
}

bool session_job_status(struct session *s, char status)
{
    /* In mid-file the backend is not listening: the closed pipe tells it instead. */
    if (s->broken || !s->no_more)
        return false;
    s->pt.deadline_ms = pt_now_ms() + (status == 'T' ? plugin.status_ms : FAILED_STATUS_MS);
    bool ok = COMMAND(s, "hearing the job's status", "JobStatus=%c", status)
              && send_packet(s, 'F', NULL, 0, "hearing the job's status")
              && expect_end(s, "closing its books");
    s->pt.deadline_ms = 0;
    s->confirmed = ok && status == 'T';
    return ok;
}
