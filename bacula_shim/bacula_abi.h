/* SPDX-License-Identifier: AGPL-3.0-or-later */
/*
 * The binary interface between bacula-fd and a command plugin on x86-64 Linux,
 * in our own words: no Bacula header is used.  Offsets were measured on
 * interface 14 (Bacula 9.6) and 23 (15.0) and read for 21 (11.0); each layout
 * is pinned by a static assertion, and the sizes a packet carries are compared
 * on every call, because a wrong layout would corrupt the whole daemon.
 */
#ifndef PH_BACULA_ABI_H
#define PH_BACULA_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>

#if !defined(__x86_64__) || !defined(__linux__)
#error "the layouts below are those of x86-64 Linux"
#endif

enum { IFACE_9_6 = 14, IFACE_11_0 = 21, IFACE_15_0 = 23 };

enum rc { RC_OK, RC_STOP, RC_ERROR, RC_MORE, RC_TERM, RC_SEEN, RC_CORE, RC_SKIP, RC_CANCEL };

enum event_type {
    EV_JOB_START = 1,
    EV_JOB_END = 2,
    EV_END_BACKUP_JOB = 4,
    EV_START_RESTORE_JOB = 5,
    EV_END_RESTORE_JOB = 6,
    EV_BACKUP_COMMAND = 9,
    EV_RESTORE_COMMAND = 10,
    EV_ESTIMATE_COMMAND = 11,
    EV_LEVEL = 12,
    EV_SINCE = 13,
    EV_CANCEL_COMMAND = 14,
    EV_RESTORE_OBJECT = 18,
    EV_PLUGIN_COMMAND = 20,
};

/* Variables with one number everywhere; those that move are in struct dialect. */
enum { VAR_JOB_ID = 1, VAR_CLIENT = 5, VAR_JOB_NAME = 6, VAR_JOB_STATUS = 7, VAR_ACCURATE = 9,
       VAR_WORKING_DIR = 13 };

enum { FT_REG = 3, FT_DIREND = 5, FT_RESTORE_FIRST = 25, FT_PLUGIN_CONFIG = 27,
       FT_PLUGIN_CONFIG_FILLED = 28 };

#define FO_OFFSETS (UINT64_C(1) << 30)

enum io_func { IO_OPEN = 1, IO_READ, IO_WRITE, IO_CLOSE, IO_SEEK };
enum create_status { CF_SKIP = 1, CF_ERROR, CF_EXTRACT, CF_CREATED, CF_CORE };

struct bacula_ctx {
    void *core;
    void *ours;
};

struct bacula_event {
    uint32_t type;
};

struct bacula_info {
    uint32_t size, version;
};

/* What the daemon offers us; only the part used, common to all interfaces. */
struct bacula_funcs {
    uint32_t size, version;
    void *register_events;
    int (*get_value)(struct bacula_ctx *, int variable, void *out);
    int (*set_value)(struct bacula_ctx *, int variable, void *in);
    int (*job_message)(struct bacula_ctx *, const char *file, int line, int type, int64_t mtime,
                       const char *format, ...) __attribute__((format(printf, 6, 7)));
};
_Static_assert(offsetof(struct bacula_funcs, get_value) == 16, "bFuncs");
_Static_assert(offsetof(struct bacula_funcs, job_message) == 32, "bFuncs");

struct plugin_info {
    uint32_t size, version;
    const char *magic, *license, *author, *date, *plugin_version, *description;
};
_Static_assert(sizeof(struct plugin_info) == 56, "pInfo");

struct save_pkt_14 {
    int32_t pkt_size;
    char *fname, *link;
    struct stat statp;
    int32_t type;
    uint64_t flags;
    bool no_read, portable, accurate_found;
    char *cmd;
    uint32_t delta_seq;
    char *object_name, *object;
    int32_t object_len, index, link_fi, pkt_end;
};
_Static_assert(sizeof(struct save_pkt_14) == 240, "save_pkt 14");
_Static_assert(offsetof(struct save_pkt_14, statp) == 24, "save_pkt 14");
_Static_assert(offsetof(struct save_pkt_14, flags) == 176, "save_pkt 14");
_Static_assert(offsetof(struct save_pkt_14, no_read) == 184, "save_pkt 14");
_Static_assert(offsetof(struct save_pkt_14, cmd) == 192, "save_pkt 14");
_Static_assert(offsetof(struct save_pkt_14, object_name) == 208, "save_pkt 14");
_Static_assert(offsetof(struct save_pkt_14, object_len) == 224, "save_pkt 14");
_Static_assert(offsetof(struct save_pkt_14, pkt_end) == 236, "save_pkt 14");

struct save_pkt_21 {
    int32_t pkt_size;
    char *fname, *snap_fname;
    int32_t plugin_mode;
    char *link;
    struct stat statp;
    int32_t type;
    uint64_t flags;
    bool no_read, portable, accurate_found, do_dedup;
    char *cmd;
    uint32_t delta_seq;
    char *object_name, *object;
    int32_t object_len, index, link_fi, pkt_end;
};
_Static_assert(sizeof(struct save_pkt_21) == 256, "save_pkt 21");
_Static_assert(offsetof(struct save_pkt_21, statp) == 40, "save_pkt 21");
_Static_assert(offsetof(struct save_pkt_21, flags) == 192, "save_pkt 21");
_Static_assert(offsetof(struct save_pkt_21, no_read) == 200, "save_pkt 21");
_Static_assert(offsetof(struct save_pkt_21, cmd) == 208, "save_pkt 21");
_Static_assert(offsetof(struct save_pkt_21, object_name) == 224, "save_pkt 21");
_Static_assert(offsetof(struct save_pkt_21, object_len) == 240, "save_pkt 21");
_Static_assert(offsetof(struct save_pkt_21, pkt_end) == 252, "save_pkt 21");

struct save_pkt_23 {
    int32_t pkt_size;
    char *fname, *snap_fname;
    int32_t plugin_mode;
    char *link;
    struct stat statp;
    int32_t type;
    uint64_t flags;
    bool no_read, portable, accurate_found, do_dedup, stat_update;
    char *cmd;
    char *object_name, *object;
    int32_t object_len, index, object_compression;
    char *plugin_object[7]; /* path, plugin, category, type, name, source, uuid */
    uint64_t plugin_object_size;
    int32_t plugin_object_status;
    uint32_t plugin_object_count;
    const void *metadata;
    uint32_t delta_seq;
    int32_t link_fi, pkt_end;
};
_Static_assert(sizeof(struct save_pkt_23) == 344, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, statp) == 40, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, flags) == 192, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, no_read) == 200, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, stat_update) == 204, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, object_name) == 216, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, object_len) == 232, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, object_compression) == 240, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, plugin_object_size) == 304, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, delta_seq) == 328, "save_pkt 23");
_Static_assert(offsetof(struct save_pkt_23, pkt_end) == 336, "save_pkt 23");

/* Before uid stand stream, data_stream, type, file_index and LinkFI
 * on 14, preceded by plugin_mode on 21 and 23; alignment of statp absorbs it. */
struct restore_pkt {
    int32_t pkt_size;
    int32_t head[7];
    struct stat statp;
    const char *attr_ex, *ofname, *olname, *where, *regex_where;
    int32_t replace, create_status;
    uint32_t delta_seq;
    int32_t pkt_end;
};
_Static_assert(sizeof(struct restore_pkt) == 232, "restore_pkt");
_Static_assert(offsetof(struct restore_pkt, statp) == 32, "restore_pkt");
_Static_assert(offsetof(struct restore_pkt, ofname) == 184, "restore_pkt");
_Static_assert(offsetof(struct restore_pkt, create_status) == 220, "restore_pkt");
_Static_assert(offsetof(struct restore_pkt, pkt_end) == 228, "restore_pkt");

struct io_pkt {
    int32_t pkt_size, func, count, flags;
    uint32_t mode;
    char *buf;
    const char *fname;
    int32_t status, io_errno, lerror, whence;
    int64_t offset;
    bool win32;
    int32_t pkt_end;
};
_Static_assert(sizeof(struct io_pkt) == 72, "io_pkt");
_Static_assert(offsetof(struct io_pkt, buf) == 24, "io_pkt");
_Static_assert(offsetof(struct io_pkt, status) == 40, "io_pkt");
_Static_assert(offsetof(struct io_pkt, offset) == 56, "io_pkt");
_Static_assert(offsetof(struct io_pkt, pkt_end) == 68, "io_pkt");

struct restore_object_pkt {
    int32_t pkt_size;
    char *object_name, *object, *plugin_name; /* plugin_name: the whole command string */
    int32_t object_type, object_len, object_full_len, object_index, object_compression, stream;
    uint32_t job_id;
    int32_t pkt_end;
};
_Static_assert(sizeof(struct restore_object_pkt) == 64, "restore_object_pkt");
_Static_assert(offsetof(struct restore_object_pkt, object_type) == 32, "restore_object_pkt");
_Static_assert(offsetof(struct restore_object_pkt, pkt_end) == 60, "restore_object_pkt");

struct xacl_pkt {
    int32_t pkt_size, func, count;
    char *content;
    int32_t pkt_end;
};
_Static_assert(sizeof(struct xacl_pkt) == 32, "xacl_pkt");

/*
 * What we offer the daemon.  It reads fixed offsets beyond `size`, so the table
 * always has the full length of the longest interface, its tail zeroed: the
 * slots behind handle_xacl differ between interfaces and may all be NULL.
 */
struct plugin_funcs {
    uint32_t size, version;
    int (*new_plugin)(struct bacula_ctx *);
    int (*free_plugin)(struct bacula_ctx *);
    int (*get_value)(struct bacula_ctx *, int, void *);
    int (*set_value)(struct bacula_ctx *, int, void *);
    int (*handle_event)(struct bacula_ctx *, struct bacula_event *, void *);
    int (*start_backup_file)(struct bacula_ctx *, void *save_pkt);
    int (*end_backup_file)(struct bacula_ctx *);
    int (*start_restore_file)(struct bacula_ctx *, const char *command);
    int (*end_restore_file)(struct bacula_ctx *);
    int (*plugin_io)(struct bacula_ctx *, struct io_pkt *);
    int (*create_file)(struct bacula_ctx *, struct restore_pkt *);
    int (*set_file_attributes)(struct bacula_ctx *, struct restore_pkt *);
    int (*check_file)(struct bacula_ctx *, char *name);
    int (*handle_xacl)(struct bacula_ctx *, struct xacl_pkt *);
    void *tail[6];
};
_Static_assert(sizeof(struct plugin_funcs) == 168, "pFuncs");
_Static_assert(offsetof(struct plugin_funcs, plugin_io) == 80, "pFuncs");
_Static_assert(offsetof(struct plugin_funcs, handle_xacl) == 112, "pFuncs");

/* Where the interfaces differ, as a table. */
struct dialect {
    uint32_t interface;
    uint32_t funcs_size;
    int32_t save_size; /* both pkt_size and pkt_end of a save_pkt hold it */
    int fatal, error, warning, info, saved, notsaved, skipped, mount, restored;
    int var_where, var_regex_where, var_exe_path, var_prev_job, var_file_index, var_replace;
    bool one_restore_at_a_time; /* per-file restore state is global in the daemon */
};

#endif
