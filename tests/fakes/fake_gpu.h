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
 *     fail FUNCTION CODE                                 that function returns that code
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

typedef unsigned long long Bytes;

typedef struct {
    char uuid[64];
    char slot[32];
    char name[64];
    Bytes total, taken, cuda_total;
    int active, integrated;
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
    int index;
    if (sscanf(line, "card %63s %31s %llu %llu %63s", card.uuid, card.slot, &card.total,
               &card.taken, card.name) == 5 && machine->card_count < MOST_CARDS) {
        card.cuda_total = card.total;
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
    }
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
    for (int i = 0; i < machine->failure_count; i++)
        if (strcmp(machine->failures[i].function, function) == 0)
            return machine->failures[i].code;
    return 0;
}

#endif
