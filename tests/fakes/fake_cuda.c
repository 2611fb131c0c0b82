/*
 * A CUDA driver, libcuda.so.1, with as much in it as whispercache calls.
 *
 * It aborts the process where a real one would quietly create a context.
 */
#include "fake_gpu.h"

enum { OK = 0, NOT_INITIALIZED = 3, NO_DEVICE = 100, BAD_DEVICE = 101, NO_CONTEXT = 201 };
enum { INTEGRATED = 18 };

static int initialised;
static _Thread_local Card current;
static _Thread_local int depth;

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
    Card *card = &machine.cards[machine.visible[device]]

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
    *text = code == 999 ? "unknown error" : "some error";
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
    (void)card;
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
    *value = attribute == INTEGRATED && card->integrated;
    return OK;
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
    *context = (void *)(size_t)(device + 1);
    return OK;
}

int cuDevicePrimaryCtxRelease_v2(int device)
{
    LOOK_AT(device);
    (void)card;
    return OK;
}

int cuCtxPushCurrent_v2(void *context)
{
    int device = (int)(size_t)context - 1;
    LOOK_AT(device);
    current = *card;
    depth++;
    return OK;
}

int cuCtxPopCurrent_v2(void **context)
{
    LOOK;
    if (depth-- == 0)
        abort();
    *context = NULL;
    return OK;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total_bytes)
{
    LOOK;
    if (depth == 0)
        return NO_CONTEXT;
    *total_bytes = current.cuda_total;
    *free_bytes = current.cuda_total - current.taken;
    return OK;
}
