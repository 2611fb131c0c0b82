/*
 * The imaginary machine that both fake drivers speak of.
 *
 * It is a text file, named by FAKE_GPU_STATE and read again at every call, so that a test
 * can let other tenants come and go while a program runs:
 *
 *     card UUID PCI_SLOT TOTAL_BYTES TAKEN_BYTES NAME    one line a card, in NVML's order
 *     visible CARD CARD ...                              CUDA's order; without it, none
 *     slice CARD BYTES                                   CUDA sees only so much of it
 *     active CARD                                        a CUDA context exists on it
 *     integrated CARD                                    it shares the host's memory
 *     capability CARD MAJOR MINOR                        which code it runs; else 8.6
 *     nopools CARD                                       it has no memory pools
 *     fail FUNCTION CODE                                 that function returns that code
 *
 * What this machine's programs, which are one process, hold of card N (the N-th `card`
 * line, from 0) is in a file beside it, ".N" added to the name. A line that is missing
 * stands for 0, the file too:
 *
 *     context BYTES      of the context; it exists if there are any
 *     used BYTES         of its memory pool, allocated and not freed
 *     reserved BYTES     of its memory pool, held of the card
 *     peak BYTES         the most that was used; never less than what is
 *     threshold BYTES    below which the pool would rather keep what is freed
 *
 * The context and the reserved bytes are taken of the card, beyond its TAKEN_BYTES. Whoever
 * changes that file (CUDA here, or the test) replaces it as a whole, by a rename.
 * Where both may at the same time, each first locks (flock) the state's name + ".lock".
 *
 * Each function called is noted, a line each, in the file named by FAKE_GPU_CALLS.
 */
#ifndef FAKE_GPU_H
#define FAKE_GPU_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_CARDS 8
#define MOST_FAILURES 8
#define MOST_FRAMES 16
#define PATH_LENGTH 4096

typedef unsigned long long Bytes;

typedef struct {
    char uuid[64];
    char slot[32];
    char name[64];
    Bytes total, taken, cuda_total;
    Bytes context, used, reserved, peak, threshold;
    int active, integrated, has_pools, major, minor;
} Card;

typedef struct {
    char function[64];
    int code;
} Failure;

typedef struct {
    Card cards[MOST_CARDS];
    int card_count;
    int visible[MOST_CARDS];
    int visible_count;
    Failure failures[MOST_FAILURES];
    int failure_count;
} Machine;

static void read_visible(Machine *machine, const char *line)
{
    int card, length;
    line += strlen("visible");
    while (machine->visible_count < MOST_CARDS
           && sscanf(line, " %d%n", &card, &length) == 1) {
        machine->visible[machine->visible_count++] = card;
        line += length;
    }
}

static void read_line(Machine *machine, const char *line)
{
    Card card = {0};
    Failure failure;
    Bytes bytes;
    int index, major, minor;
    if (sscanf(line, "card %63s %31s %llu %llu %63s", card.uuid, card.slot, &card.total,
               &card.taken, card.name) == 5 && machine->card_count < MOST_CARDS) {
        card.cuda_total = card.total;
        card.has_pools = 1;
        card.major = 8;
        card.minor = 6;
        machine->cards[machine->card_count++] = card;
    } else if (strncmp(line, "visible", strlen("visible")) == 0) {
        read_visible(machine, line);
    } else if (sscanf(line, "fail %63s %d", failure.function, &failure.code) == 2
               && machine->failure_count < MOST_FAILURES) {
        machine->failures[machine->failure_count++] = failure;
    } else if (sscanf(line, "slice %d %llu", &index, &bytes) == 2) {
        machine->cards[index].cuda_total = bytes;
    } else if (sscanf(line, "active %d", &index) == 1) {
        machine->cards[index].active = 1;
    } else if (sscanf(line, "integrated %d", &index) == 1) {
        machine->cards[index].integrated = 1;
    } else if (sscanf(line, "capability %d %d %d", &index, &major, &minor) == 3) {
        machine->cards[index].major = major;
        machine->cards[index].minor = minor;
    } else if (sscanf(line, "nopools %d", &index) == 1) {
        machine->cards[index].has_pools = 0;
    }
}

static void read_held_line(Card *card, const char *line)
{
    char word[32];
    Bytes bytes;
    if (sscanf(line, "%31s %llu", word, &bytes) != 2)
        return;
    if (strcmp(word, "context") == 0)
        card->context = bytes;
    else if (strcmp(word, "used") == 0)
        card->used = bytes;
    else if (strcmp(word, "reserved") == 0)
        card->reserved = bytes;
    else if (strcmp(word, "peak") == 0)
        card->peak = bytes;
    else if (strcmp(word, "threshold") == 0)
        card->threshold = bytes;
}

/* The name of the file that says what is held of card `index`. */
static void held_path(char *path, size_t length, int index)
{
    snprintf(path, length, "%s.%d", getenv("FAKE_GPU_STATE"), index);
}

static void read_held(Machine *machine, int index)
{
    Card *card = &machine->cards[index];
    char path[PATH_LENGTH], line[256];
    held_path(path, sizeof path, index);
    FILE *file = fopen(path, "r");
    if (file) {
        while (fgets(line, sizeof line, file))
            read_held_line(card, line);
        fclose(file);
    }
    card->active = card->active || card->context > 0;
    card->taken += card->context + card->reserved;
    if (card->peak < card->used)
        card->peak = card->used;
}

/* What is free, where more may be taken than a slice has. */
static inline Bytes free_of(Bytes total, Bytes taken)
{
    return taken < total ? total - taken : 0;
}

static void note_call(const char *function)
{
    const char *path = getenv("FAKE_GPU_CALLS");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) {
        fprintf(file, "%s\n", function);
        fclose(file);
    }
}

/* Read the machine; the code that FUNCTION must fail with, or 0. */
static int look(Machine *machine, const char *function)
{
    char line[256];
    const char *path = getenv("FAKE_GPU_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    memset(machine, 0, sizeof *machine);
    note_call(function);
    if (file) {
        while (fgets(line, sizeof line, file))
            read_line(machine, line);
        fclose(file);
    }
    for (int i = 0; i < machine->card_count; i++)
        read_held(machine, i);
    for (int i = 0; i < machine->failure_count; i++)
        if (strcmp(machine->failures[i].function, function) == 0)
            return machine->failures[i].code;
    return 0;
}

#endif
