/*
 * NVML, libnvidia-ml.so.1, with as much in it as whispercache calls through nvidia-ml-py.
 */
#include "fake_gpu.h"

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_FOUND = 6, TOO_SMALL = 7 };

typedef struct {
    Bytes total, free, used;
} Memory;

static int initialised;
static char handles[MOST_CARDS]; /* the handle of card i is &handles[i] */

/* Read the machine into `machine`; return from the caller if the call is to fail. */
#define LOOK \
    Machine machine; \
    int code = look(&machine, __func__); \
    if (code != OK) \
        return code; \
    if (!initialised) \
        return UNINITIALIZED

int nvmlInitWithFlags(unsigned flags)
{
    Machine machine;
    int code = look(&machine, __func__);
    (void)flags;
    initialised = initialised || code == OK;
    return code;
}

const char *nvmlErrorString(int code)
{
    return code == 3 ? "Not Supported" : code == 15 ? "GPU is lost" : "Some error";
}

int nvmlSystemGetDriverVersion(char *text, unsigned length)
{
    LOOK;
    static const char version[] = "580.00.01";
    if (length < sizeof version)
        return TOO_SMALL;
    strcpy(text, version);
    return OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    LOOK;
    for (int i = 0; i < machine.card_count; i++)
        if (strcmp(machine.cards[i].uuid, uuid) == 0) {
            *handle = &handles[i];
            return OK;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *slot, void **handle)
{
    LOOK;
    for (int i = 0; i < machine.card_count; i++)
        if (strcmp(machine.cards[i].slot, slot) == 0) {
            *handle = &handles[i];
            return OK;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    LOOK;
    *count = (unsigned)machine.card_count;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    LOOK;
    if (index >= (unsigned)machine.card_count)
        return INVALID;
    *handle = &handles[index];
    return OK;
}

int nvmlDeviceGetName(void *handle, char *name, unsigned length)
{
    LOOK;
    long index = (char *)handle - handles;
    if (index < 0 || index >= machine.card_count)
        return INVALID;
    if (length <= strlen(machine.cards[index].name))
        return TOO_SMALL;
    strcpy(name, machine.cards[index].name);
    return OK;
}

int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory)
{
    LOOK;
    long index = (char *)handle - handles;
    if (index < 0 || index >= machine.card_count)
        return INVALID;
    Card *card = &machine.cards[index];
    memory->total = card->total;
    memory->free = free_of(card->total, card->taken);
    memory->used = card->total - memory->free;
    return OK;
}

/* Pids are wrong in containers, and bytes unknown on Windows: nobody may ask. */
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, void *infos)
{
    LOOK;
    (void)handle, (void)infos;
    *count = 0;
    return OK;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *count, void *infos)
{
    LOOK;
    (void)handle, (void)infos;
    *count = 0;
    return OK;
}
