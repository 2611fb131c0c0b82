/*
 * A CUDA driver, libcuda.so.1, with as much in it as whispercache calls.
 *
 * It aborts the process where a real one would quietly create a context. It allocates
 * nothing: the test says what is held, by the files that fake_gpu.h explains.
 */
#define _POSIX_C_SOURCE 200809L /* mkstemp, fdopen */
#include "fake_gpu.h"
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

enum {
    OK = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    BAD_DEVICE = 101,
    NO_CONTEXT = 201,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
    UNKNOWN = 999,
};
enum { INTEGRATED = 18, MAJOR = 75, MINOR = 76, POOLS = 115 };
enum { THRESHOLD = 4, RESERVED_CURRENT = 5, USED_CURRENT = 7, USED_HIGH = 8 };

/* A context that a thread has made current. */
typedef struct {
    int card;
    int is_synchronised; /* since it was pushed */
} Frame;

static int initialised;
static _Thread_local Frame frames[MOST_FRAMES];
static _Thread_local int depth;

/* Handles are addresses, which do not fit into 32 bits: of context i, or of pool i. */
static char contexts[MOST_CARDS];
static char pools[MOST_CARDS];

/* Read the machine into `machine`; return from the caller if the call is to fail. */
#define LOOK \
    Machine machine; \
    int code = look(&machine, __func__); \
    if (code != OK) \
        return code; \
    if (!initialised) \
        return NOT_INITIALIZED

/* Also find the card that the CUDA number `device` stands for. */
#define LOOK_AT(device) \
    LOOK; \
    if ((device) < 0 || (device) >= machine.visible_count) \
        return BAD_DEVICE; \
    int index = machine.visible[device]; \
    Card *card = &machine.cards[index]; \
    (void)card

/* Find the card whose pool is meant. */
#define LOOK_INTO(pool) \
    LOOK; \
    int index = handle_index(pool, pools, machine.card_count); \
    if (index < 0) \
        return INVALID_VALUE; \
    Card *card = &machine.cards[index]

/* Which of the first `count` handles in `all` this one is; -1 if none. */
static int handle_index(void *handle, char *all, int count)
{
    for (int i = 0; i < count; i++)
        if (handle == &all[i])
            return i;
    return -1;
}

/* Nobody else changes what is held until the end of the block: see fake_gpu.h. */
#define ALONE __attribute__((cleanup(let_others))) int lock = wait_for_others()

static int wait_for_others(void)
{
    char path[PATH_LENGTH];
    const char *state = getenv("FAKE_GPU_STATE");
    snprintf(path, sizeof path, "%s.lock", state ? state : "");
    int lock = state ? open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0600) : -1;
    if (lock >= 0 && flock(lock, LOCK_EX) != 0)
        abort();
    return lock;
}

static void let_others(int *lock)
{
    if (*lock >= 0)
        close(*lock);
}

/* Put what `card` says is held into the file for card `index`. */
static void write_held(int index, const Card *card)
{
    char path[PATH_LENGTH], fresh[PATH_LENGTH + 8];
    held_path(path, sizeof path, index);
    snprintf(fresh, sizeof fresh, "%s.XXXXXX", path);
    int descriptor = mkstemp(fresh);
    FILE *file = descriptor < 0 ? NULL : fdopen(descriptor, "w");
    if (!file)
        abort();
    fprintf(file, "context %llu\nused %llu\nreserved %llu\npeak %llu\nthreshold %llu\n",
            card->context, card->used, card->reserved, card->peak, card->threshold);
    if (fclose(file) != 0 || rename(fresh, path) != 0)
        abort();
}

int cuInit(unsigned flags)
{
    Machine machine;
    int code = look(&machine, __func__);
    (void)flags;
    if (code == OK && machine.visible_count == 0)
        code = NO_DEVICE;
    initialised = code == OK;
    return code;
}

int cuGetErrorString(int code, const char **text)
{
    switch (code) {
    case OUT_OF_MEMORY:
        *text = "out of memory";
        break;
    case ILLEGAL_ADDRESS:
        *text = "an illegal memory access was encountered";
        break;
    case UNKNOWN:
        *text = "unknown error";
        break;
    default:
        *text = "some error";
    }
    return OK;
}

int cuDeviceGetCount(int *count)
{
    LOOK;
    *count = machine.visible_count;
    return OK;
}

int cuDeviceGet(int *device, int ordinal)
{
    LOOK_AT(ordinal);
    *device = ordinal;
    return OK;
}

int cuDeviceGetUuid_v2(unsigned char *uuid, int device)
{
    LOOK_AT(device);
    const char *digits = strchr(card->uuid, '-') + 1;
    for (int i = 0; i < 16; i++) {
        unsigned byte;
        while (*digits == '-')
            digits++;
        sscanf(digits, "%2x", &byte);
        uuid[i] = (unsigned char)byte;
        digits += 2;
    }
    return OK;
}

int cuDeviceGetPCIBusId(char *slot, int length, int device)
{
    LOOK_AT(device);
    snprintf(slot, (size_t)length, "%s", card->slot);
    return OK;
}

int cuDeviceGetName(char *name, int length, int device)
{
    LOOK_AT(device);
    snprintf(name, (size_t)length, "%s", card->name);
    return OK;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device)
{
    LOOK_AT(device);
    *bytes = card->cuda_total;
    return OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device)
{
    LOOK_AT(device);
    switch (attribute) {
    case INTEGRATED:
        *value = card->integrated;
        return OK;
    case MAJOR:
        *value = card->major;
        return OK;
    case MINOR:
        *value = card->minor;
        return OK;
    case POOLS:
        *value = card->has_pools;
        return OK;
    default:
        return INVALID_VALUE;
    }
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active)
{
    LOOK_AT(device);
    *flags = 0;
    *active = card->active;
    return OK;
}

int cuDevicePrimaryCtxRetain(void **context, int device)
{
    LOOK_AT(device);
    if (!card->active)
        abort();
    *context = &contexts[index];
    return OK;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
    LOOK_AT(device);
    return OK;
}

int cuCtxPushCurrent_v2(void *context)
{
    LOOK;
    int index = handle_index(context, contexts, machine.card_count);
    if (index < 0 || depth == MOST_FRAMES)
        return INVALID_VALUE;
    frames[depth++] = (Frame){.card = index};
    return OK;
}

int cuCtxPopCurrent_v2(void **context)
{
    LOOK;
    if (depth == 0)
        abort();
    *context = &contexts[frames[--depth].card];
    return OK;
}

int cuCtxSynchronize(void)
{
    LOOK;
    if (depth == 0)
        return NO_CONTEXT;
    frames[depth - 1].is_synchronised = 1;
    return OK;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    LOOK;
    if (depth == 0)
        return NO_CONTEXT;
    const Card *card = &machine.cards[frames[depth - 1].card];
    *total_bytes = card->cuda_total;
    *free_bytes = free_of(card->cuda_total, card->taken);
    return OK;
}

int cuDeviceGetMemPool(void **pool, int device)
{
    LOOK_AT(device);
    if (!card->has_pools)
        return NOT_SUPPORTED;
    *pool = &pools[index];
    return OK;
}

int cuMemPoolGetAttribute(void *pool, int attribute, void *value)
{
    LOOK_INTO(pool);
    Bytes *bytes = value;
    switch (attribute) {
    case THRESHOLD:
        *bytes = card->threshold;
        return OK;
    case RESERVED_CURRENT:
        *bytes = card->reserved;
        return OK;
    case USED_CURRENT:
        *bytes = card->used;
        return OK;
    case USED_HIGH:
        *bytes = card->peak;
        return OK;
    default:
        return INVALID_VALUE;
    }
}

int cuMemPoolSetAttribute(void *pool, int attribute, void *value)
{
    ALONE;
    LOOK_INTO(pool);
    const Bytes *bytes = value;
    if (attribute == THRESHOLD)
        card->threshold = *bytes;
    else if (attribute == USED_HIGH && *bytes == 0)
        card->peak = card->used;
    else
        return INVALID_VALUE;
    write_held(index, card);
    return OK;
}

/* Frees that no synchronise has confirmed are pending: a trim leaves them. */
int cuMemPoolTrimTo(void *pool, size_t keep_bytes)
{
    ALONE;
    LOOK_INTO(pool);
    if (depth == 0 || frames[depth - 1].card != index || !frames[depth - 1].is_synchronised)
        return OK;
    Bytes least = card->used > keep_bytes ? card->used : keep_bytes;
    if (card->reserved > least) {
        card->reserved = least;
        write_held(index, card);
    }
    return OK;
}
